"""Results of measurements: records, files of records, tables, plots and HTML reports."""
