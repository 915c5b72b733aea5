"""What the command `peft-cl` does, a file for each of its words; `peft_cl.cli` reads the command line."""

from __future__ import annotations
