"""What backs a speed claim; each ends in one JSON line with achieved against possible. No test depends on it."""
