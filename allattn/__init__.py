"""The console command `allattn`: it knows the other packages by name alone, and imports none before it is asked to."""
