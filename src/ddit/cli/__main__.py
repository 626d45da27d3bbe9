import sys

from ddit.cli import main

sys.exit(main())
