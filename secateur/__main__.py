"""``python -m secateur``: the same as the command ``secateur``."""

from secateur.tools.cli import main

if __name__ == "__main__":
    main()
