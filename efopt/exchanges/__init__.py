"""How the workers' payloads become one average. One way of meeting a file."""
