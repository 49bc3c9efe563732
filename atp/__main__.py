"""`python -m atp` is the command `atp`; `torchrun -m atp` needs it."""

from atp.cli import main

if __name__ == "__main__":
    main()
