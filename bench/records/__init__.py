"""What becomes of measurements: records, files of them, tables, pictures and pages."""
