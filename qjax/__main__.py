"""`python -m qjax …` is the `qjax` command."""

import sys

from qjax._cli import main

sys.exit(main())
