"""The plots of a report. Only the reports of runs and sweeps import matplotlib."""
