"""What the commands of `pisces` do, and the sheets of pictures that they write."""
