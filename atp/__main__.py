"""`python -m atp`, as `torchrun -m atp` needs it."""

from atp.cli import main

main()
