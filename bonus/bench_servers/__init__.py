"""The servers that bench.py compares with chat.py, and the crowd that talks to all."""
