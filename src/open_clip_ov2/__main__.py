"""`python -m open_clip_ov2` is `ov2`."""

import sys

from open_clip_ov2.cli import main

sys.exit(main())
