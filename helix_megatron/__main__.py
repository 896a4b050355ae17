"""`python -m helix_megatron`: the `helix` command."""

import sys

from helix_megatron.cli import main

sys.exit(main())
