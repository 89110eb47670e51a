"""The front door: command line, demo, dev stack. It imports the three services; nothing imports it."""
