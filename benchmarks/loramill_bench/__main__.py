"""`python -m loramill_bench`."""

from loramill_bench.cli import main

if __name__ == "__main__":
    main()
