"""The benchmarks behind every speed claim; each ends in one JSON line with achieved and possible speed."""
