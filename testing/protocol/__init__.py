"""N instances' protocol without SGLang: random requests driven through the real books, messages, admission and decode decisions.

What is SGLang's in a server is a small fake here: the page pool, the scheduler's queues, requests whose tokens are only counted. What is
ours is the code that serves: `Participant`, and what admission.py, sitting_out.py, retraction.py and sync.py decide about pages.
"""
