"""The commands of `skipstep`, a module each: `add_options(parser)` and `run(options)`."""
