"""What is learned: fields, routes, rollouts, the distillation loop, the student, teachers, backbones."""
