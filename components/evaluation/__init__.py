"""What the examples of an attack say about a model: norms, accuracy, statistics, tests of the attack itself."""
