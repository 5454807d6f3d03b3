"""Side-by-side measurements: `python -m benchmarks.NAME [--quick]`, results as committed JSON and a table made from it."""
