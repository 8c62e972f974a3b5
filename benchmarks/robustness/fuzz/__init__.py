"""Bad input by the thousand, each case through the command line."""
