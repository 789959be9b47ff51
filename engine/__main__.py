from skipstep.cli import main

raise SystemExit(main())
