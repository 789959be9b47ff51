from skipstep.commands.main import main

raise SystemExit(main())
