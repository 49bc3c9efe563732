"""The command `atp`, also as `python -m atp`, which `torchrun -m atp` needs."""

from atp.ground.ending import lacking

try:
    from atp.cli.cli import main
except ModuleNotFoundError as error:  # the kernels are installed without the extra `train`
    raise lacking(error) from None

if __name__ == "__main__":
    main()
