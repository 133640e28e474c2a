"""Side by side with peers: time and memory. `make bench` measures and writes docs/benchmarks.md."""
