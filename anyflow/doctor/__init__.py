"""``anyflow doctor``: what a machine does with this project, measured item by item, each in a process of its own.

``items`` says what there is; ``running`` starts the children, ends those that hang, and keeps to the minutes;
``telling`` makes a line of what each found, and the verdict. A child is ``child``: it runs one item's ``examine``,
which notes what it finds in ``findings``, on what ``here`` says that there is.
"""
