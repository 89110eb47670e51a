"""The dev stack: a broker and an index in processes of the user's own, for the demo and the tests. Extra `embedded`."""
