"""Results in the formats of other programs: files of classifiers and RobustBench's records."""
