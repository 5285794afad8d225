"""What the tables of docs/measurements.md say in words."""

FINDINGS = {
    "start": "",
    "time": ("Time", ""),
    "missing": ("Missing images and unnormalised vectors", ""),
    "optimisation": ("Optimisation", ""),
    "transfer": ("Transfer", ""),
}
