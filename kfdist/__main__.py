"""`python -m kfdist` is the `kfdist` command."""

from kfdist.cli.main import main

if __name__ == "__main__":
    main()
