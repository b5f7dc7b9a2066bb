"""``python -m tierlm``."""

from tierlm.cli import main

if __name__ == "__main__":
    main()
