"""In: `python -m cache_kd …`. Out: the command line."""

from cache_kd.cli import main

if __name__ == "__main__":
    main()
