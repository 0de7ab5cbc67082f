"""The report: one HTML file in which a person sees what the machine decided."""
