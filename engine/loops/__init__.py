"""How a plan is walked: the loop contract and its forms. ADD A LOOP FORM here."""
