"""What is data and not code: presets, output names, citations, the report's template."""
