"""The commands of ``anyflow``, one file each: they read arguments, call a room of the house, and print."""
