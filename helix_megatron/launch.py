"""`python -m helix_megatron.launch`: ranks as processes of this machine; see host/launcher.py."""

import sys

from helix_megatron.host.launcher import main

if __name__ == "__main__":
    sys.exit(main())
