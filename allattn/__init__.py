"""The console command `allattn`: it knows the other packages by name and imports one only to run its command."""
