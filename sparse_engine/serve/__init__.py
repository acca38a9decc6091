"""Images on request: one HTTP application with a batcher of its own, for one process or, through Ray Serve, many.

asked      a request's JSON, checked
batcher    what waits, in lanes of one key; which rows are drawn together
drawing    an engine, and a batch drawn on it
service    engines, batcher and metrics, from loading to draining
guard      what every request passes first: key, size and speed of the body
app        the routes
server     uvicorn, and what signals do
replicas   the same application under Ray Serve
"""
