"""`jfa-bench card`: what a card is asked in a short time, most valuable first, over as many calls as it takes.

plan.py lists the units of work; ledger.py keeps what is done in a folder; session.py runs what is left until the time
is over; page.py writes the folder's page. correctness.py and tuning.py are the units that no other command has.
"""
