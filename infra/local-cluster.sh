#!/usr/bin/env bash
# A one-machine Ray cluster with token authentication, for `ray job submit`. Linux.
#
#   infra/local-cluster.sh start     start the head; print what to export and how to submit
#   infra/local-cluster.sh status    say whether it runs
#   infra/local-cluster.sh stop      stop the processes that `start` started, and no others
#                                    (`ray stop` would stop every Ray on the machine)
#
# Settings, from the environment; give `stop` and `status` the same LOCAL_RAY_PORT:
#   LOCAL_RAY_PORT             6379   port of the head (GCS); names the state directory
#   LOCAL_RAY_DASHBOARD_PORT   8265   dashboard and Jobs API
#   LOCAL_RAY_CLIENT_PORT     10001   Ray client server; nothing here uses it, but `ray start` always starts it
#   LOCAL_RAY_AGENT_PORT      52365   dashboard agent
# Every port listens on 127.0.0.1 only; infra/README.md lists them.
#   LOCAL_RAY_CPUS, LOCAL_RAY_GPUS    CPUs and GPUs that Ray may use; unset: those it finds
#   RAY                               the ray command; unset: .venv/bin/ray, else ray in PATH
# The token is Ray's: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. It is created if none exists.
set -euo pipefail
umask 077 # Only the user may read the token.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
port=${LOCAL_RAY_PORT:-6379}
dashboard_port=${LOCAL_RAY_DASHBOARD_PORT:-8265}
client_port=${LOCAL_RAY_CLIENT_PORT:-10001}
agent_port=${LOCAL_RAY_AGENT_PORT:-52365}
# The directory is closed to other users, because Ray opens its own directory inside to everyone. Its path is
# short, because Ray puts Unix sockets there, whose paths are limited to 107 characters.
state=/tmp/defendpp-$(id -u)-$port
ray_dir=$state/r
pid_file=$state/head.pid

die() {
  echo "local-cluster.sh: $*" >&2
  exit 1
}

# Print the pids of a session's processes, without zombies. `start` gives the head its own session, and its
# children stay in it.
session_pids() {
  pgrep -s "$1" -U "$(id -u)" -r D,I,R,S,T || true
}

# Print the recorded head's pid, which is also its session's id, and its start time. Fail if the machine has
# restarted since.
recorded_head() {
  local pid start_time boot
  [[ -r $pid_file ]] || return 1
  read -r pid start_time boot <"$pid_file" || return 1
  [[ $boot == "$(boot_id)" ]] || return 1
  echo "$pid $start_time"
}

# Print the recorded head's pid if it is still the same process: pids are reused.
running_head() {
  local pid start_time recorded
  recorded=$(recorded_head) || return 1
  read -r pid start_time <<<"$recorded"
  [[ $(start_time_of "$pid") == "$start_time" ]] || return 1
  echo "$pid"
}

boot_id() {
  cat /proc/sys/kernel/random/boot_id
}

# Print the start time of a process (field 22 of /proc/PID/stat), or nothing if it is gone or a zombie. Together
# with the pid it identifies the process until the machine restarts.
start_time_of() {
  local stat fields
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  read -r -a fields <<<"${stat##*) }"
  [[ ${fields[0]} == Z ]] || echo "${fields[19]}"
}

# Refuse ports for which Ray would print a traceback.
check_ports() {
  local names=(LOCAL_RAY_PORT LOCAL_RAY_DASHBOARD_PORT LOCAL_RAY_CLIENT_PORT LOCAL_RAY_AGENT_PORT)
  local ports=("$port" "$dashboard_port" "$client_port" "$agent_port") i j
  for i in "${!ports[@]}"; do
    [[ ${ports[i]} =~ ^[1-9][0-9]{3,4}$ ]] && ((ports[i] >= 1024 && ports[i] <= 65535)) ||
      die "${names[i]}=${ports[i]} must be a port from 1024 to 65535"
    for ((j = 0; j < i; j++)); do
      [[ ${ports[i]} != "${ports[j]}" ]] || die "${names[i]}=${ports[i]} is taken by ${names[j]}"
    done
  done
  for i in "${!ports[@]}"; do
    ! port_is_taken "${ports[i]}" || die "port ${ports[i]} is taken; choose another with ${names[i]}"
  done
}

port_is_taken() {
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

find_ray() {
  if [[ -n ${RAY:-} ]]; then
    echo "$RAY"
  elif [[ -x $root/.venv/bin/ray ]]; then
    echo "$root/.venv/bin/ray"
  else
    command -v ray || die "no ray command: run 'make .venv/installed' or set RAY=/path/to/ray"
  fi
}

start() {
  command -v setsid >/dev/null ||
    die "needs setsid (util-linux); on another system use 'ray start --head' and 'ray stop'"
  command -v pgrep >/dev/null || die "needs pgrep (procps)"
  local ray head args
  ray=$(find_ray)
  if head=$(running_head); then
    die "runs already (pid $head); stop it first with: LOCAL_RAY_PORT=$port $0 stop"
  fi
  check_ports
  [[ -d $state ]] || mkdir -m 700 "$state"
  [[ -O $state && ! -L $state ]] || die "$state belongs to someone else"
  chmod 700 "$state"
  rm -rf "$ray_dir" # It holds the logs of the last start.

  export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
  # Without this, Ray resolves 127.0.0.1 to an address that other machines reach. Despite its name it works on Linux.
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
  # A job's `python` is looked up in the head's PATH. It must be the Python that has Ray.
  PATH=$(cd "$(dirname "$(command -v "$ray")")" && pwd):$PATH
  export PATH
  unset RAY_ADDRESS # `ray start --head` refuses to start if it is set.
  "$ray" get-auth-token --generate >/dev/null 2>&1 ||
    die "no token; see: RAY_AUTH_MODE=token $ray get-auth-token --generate"

  args=(
    --head --block --disable-usage-stats "--port=$port"
    --include-dashboard=true --dashboard-host=127.0.0.1 "--dashboard-port=$dashboard_port"
    "--ray-client-server-port=$client_port" "--dashboard-agent-listen-port=$agent_port" "--temp-dir=$ray_dir"
    # Workers take any free port. By default Ray reserves 10002 to 19999 for them and refuses to use these for
    # its services.
    --min-worker-port=0 --max-worker-port=0
  )
  [[ -z ${LOCAL_RAY_CPUS:-} ]] || args+=("--num-cpus=$LOCAL_RAY_CPUS")
  [[ -z ${LOCAL_RAY_GPUS:-} ]] || args+=("--num-gpus=$LOCAL_RAY_GPUS")
  # This process is no process-group leader, so setsid does not fork and $! is the head itself.
  setsid "$ray" start "${args[@]}" </dev/null >"$state/head.log" 2>&1 &
  head=$!
  echo "$head $(start_time_of "$head") $(boot_id)" >"$pid_file"

  trap 'stop; exit 130' INT TERM
  # Ask the Jobs API with the token. Once it answers, it accepts submissions.
  for ((i = 0; i < 120; i++)); do
    if ! running_head >/dev/null; then
      tail -n 20 "$state/head.log" >&2
      die "the head died; log: $state/head.log"
    fi
    if port_is_taken "$dashboard_port" &&
      "$ray" job list --address "http://127.0.0.1:$dashboard_port" >/dev/null 2>&1; then
      break
    fi
    sleep 1
  done
  if ((i == 120)); then
    tail -n 20 "$state/head.log" >&2
    stop
    die "the Jobs API did not answer; log: $state/head.log"
  fi

  trap - INT TERM

  cat <<TEXT
Ray runs (pid $head; logs: $state). In the shell that submits:

  export RAY_AUTH_MODE=token
  export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard_port

  cd $(printf %q "$root")
  $(printf %q "$ray") job submit --working-dir . -- DEFENDPP_REVISION=\$(git describe --always --abbrev=40 --dirty --exclude '*') \\
    python pipeline/main.py run mnist-demo --storage "\$HOME/defendpp"

Dashboard: http://127.0.0.1:$dashboard_port (it asks for the token: '$ray get-auth-token' prints it).
Stop: LOCAL_RAY_PORT=$port $0 stop
TEXT
}

stop() {
  local head pids
  if ! head=$(running_head); then
    # A head that died may leave children behind. They keep its session's id, so no other process gets that pid.
    head=$(recorded_head) || head=
    head=${head%% *}
    if [[ -z $head || -n $(start_time_of "$head") || -z $(session_pids "$head") ]]; then
      rm -f "$pid_file"
      echo "not running on port $port"
      return 0
    fi
    echo "the head is gone; stopping what it left"
  fi
  # The head alone would wait 15 s for actors that outlive their jobs.
  # shellcheck disable=SC2046 # Each word is a pid.
  kill -TERM $(session_pids "$head") 2>/dev/null || true
  for ((i = 0; i < 10; i++)); do
    [[ -n $(session_pids "$head") ]] || break
    sleep 0.5
  done
  pids=$(session_pids "$head")
  if [[ -n $pids ]]; then
    # shellcheck disable=SC2086 # Each word is a pid.
    kill -KILL $pids 2>/dev/null || true
    sleep 0.5
  fi
  pids=$(session_pids "$head")
  [[ -z $pids ]] || die "these processes are still there: ${pids//$'\n'/ }"
  rm -f "$pid_file"
  echo "stopped (logs stay in $state)"
}

status() {
  local head
  if head=$(running_head); then
    echo "runs: pid $head, $(session_pids "$head" | wc -l) processes; logs: $state"
  else
    echo "not running on port $port"
    return 1
  fi
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  status) status ;;
  *) die "usage: $0 start|status|stop (settings: the head of this file)" ;;
esac
