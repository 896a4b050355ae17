"""`python -m helix_megatron.launch`: ranks as processes of this machine; see host/launch_command.py."""

import sys

from helix_megatron.host.launch_command import main

if __name__ == "__main__":
    sys.exit(main())
