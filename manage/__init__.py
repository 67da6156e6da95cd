"""What orders and writes."""

import utils  # noqa: F401 - before torch
