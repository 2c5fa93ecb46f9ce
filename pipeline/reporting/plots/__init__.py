"""The plots of a report. Only pipeline.reporting and the report of a sweep import matplotlib."""
