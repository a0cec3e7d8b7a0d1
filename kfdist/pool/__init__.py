"""The pool: owners as Ray actors, and what watches over them."""
