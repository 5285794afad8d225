"""`python -m mmm4rec_cli COMMAND`."""

import sys

from mmm4rec_cli.app import main

if __name__ == "__main__":
    sys.exit(main())
