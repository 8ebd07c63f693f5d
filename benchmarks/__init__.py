"""`hd-bench`: how fast, how large and how true, on this machine; and beside what one would use otherwise."""
