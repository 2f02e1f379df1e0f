"""`python -m jaxllm`: the `jaxllm` command."""

import sys

from jaxllm.cli import main

sys.exit(main())
