"""The sub-commands of `riverrun`, one file each, with heavy imports inside the functions so that --help is fast."""
