"""The published systems, one file each, grouped by the problem they solve."""
