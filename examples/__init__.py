"""Sample scenes for the commands of the README, and worked examples on pictures that others drew, one folder each."""
