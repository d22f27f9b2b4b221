"""`python -m rooflight`: the command `rooflight`."""

from .bench.cli import main

if __name__ == "__main__":
    main()
